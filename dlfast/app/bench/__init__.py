"""``dlfast bench``: fused against every strong mode of PyTorch, in one run.

One protocol for every question: the variants of a problem take turns, so that a busy machine slows them all
alike; medians and quartiles over the rounds; a ratio is taken round by round against the fastest mode of
PyTorch in that same run. Rows where dlfast loses stay in the table.
"""
