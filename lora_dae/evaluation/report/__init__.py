"""What a person reads: the ``table`` and its ``protocol``, plots, examples, and the ``page`` that holds them."""
