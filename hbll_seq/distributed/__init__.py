"""One model's blocks spread over processes: who holds which, sums of gradients, and the whole model put together again."""
