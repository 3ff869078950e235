"""The parts of methods: one file for each slot of the loss."""
