"""What is wrong with a run or an adapter, and what to change: rules that look at numbers. Below training, which is watched by them."""
