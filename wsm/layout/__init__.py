"""What is where inside an image: groups, tensors, KV blocks; and what is known of a model."""
