"""What a training step needs around its experts: attention, the output layer's loss, products."""
