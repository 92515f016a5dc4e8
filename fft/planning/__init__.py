"""What is decided before anything starts: inputs, batches, stages, their time and their memory."""
