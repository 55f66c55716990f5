"""Tables and pictures for people; what they show comes as plain figures."""
