"""What a pair is, where pairs come from, and the batches made of them."""
