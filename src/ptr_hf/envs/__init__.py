"""What simulated environments need around them."""
