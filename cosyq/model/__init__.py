"""The three networks in plain PyTorch, for inference only.

A model here is built from its configuration alone and knows nothing of files, formats or recipes.
Every linear layer starts as `nn.Linear`; `quantize.linear` swaps the packed ones in.
Matrix products run in the compute dtype; residual streams, norms and the ODE state stay float32.
"""
