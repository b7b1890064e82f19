"""The attribute classifier of the studio's photos: ``classifier`` reads; ``fit`` and ``recipe`` made it."""
