"""How profiles are made."""
