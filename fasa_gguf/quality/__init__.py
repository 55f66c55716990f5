"""How close FASA stays to dense."""
