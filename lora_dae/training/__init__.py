"""From a config to a finished run: ``run`` is the story; ``module``, ``objective`` and ``on_policy`` the maths of
a step; ``callbacks``, ``ema``, ``tracking``, ``precision`` what goes on around it."""
