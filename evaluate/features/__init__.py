"""What is shown of single features."""
