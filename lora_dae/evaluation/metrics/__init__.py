"""Numbers of images: ``features`` of sets, one number per image, distances; ``observe`` looks, ``measure`` sums up."""
