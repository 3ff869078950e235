"""What methods choose from: one file for each slot of the loss."""
