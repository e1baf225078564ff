"""Jinja templates of the model cards; `hf_fedlarge.cards` renders them."""
