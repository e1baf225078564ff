"""The client's side: the Trainer that trains adapters on a streamed package, and the program that runs it."""
