"""A federation on Flower: the rounds, journal and bytes of `rounds.py`, with Flower's messages between the machines.

    letters.py      files as the content of a message, and back
    mailbox.py      the server's store, whose files Flower carries to clients and back
    server.py       the ServerApp: `rounds.drive` with clients that are reached so
    client.py       the ClientApp: one order of the server's
    work.py         what it does for that: `trainers/join.py`
    resident.py     a process that does it in its place, with libraries and model loaded
    new_app.py      `hf-fedlarge flower init`

Nothing else imports flwr. Its strategies are left out, for they believe what clients send, and its simulation, for
`hf-fedlarge run` is one. Messages carry orders, adapters and updates; packages are fetched by digest from a store.
"""
