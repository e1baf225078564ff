"""The server's side: one thin program a stage, each the same as the `hf-fedlarge` command."""
