"""What a context takes, and where K and V lie."""
