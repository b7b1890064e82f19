"""Images from a run or an adapter file: ``schedulers`` by name, the reverse ``loop``, ``load`` and ``draw``.

``finished`` reads the config of a run, without torch.
"""
