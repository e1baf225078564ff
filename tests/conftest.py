"""What all tests share."""

import torch

# The models are tiny and the cores shared: threads that wait for each other cost more than they compute.
torch.set_num_threads(1)
