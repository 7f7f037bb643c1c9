"""MemoryFormer (arXiv 2411.12992): look-up layers in place of linear ones, and as experts.

`config` has the flags, `layer` the look-up layer and its feed-forward network, `attention`
attention, `experts` the bank of look-up experts, `fit` tables fitted to a map that exists, `usage`
how rows are used, `sizes` how much memory tables take, `official` weights of the official code.
"""
