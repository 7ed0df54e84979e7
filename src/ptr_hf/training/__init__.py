"""What `PTRTrainer` is made of."""
