"""Training runs that compare methods, and what they leave."""
