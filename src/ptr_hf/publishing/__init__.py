"""What is published: pushes, model cards, and what a card states."""
