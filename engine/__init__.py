"""How rows are computed: a prompt with its responses, spread over ranks and optimizer steps, and run through the model.

rows.py builds rows and plan.py spreads them; packing.py lays those of a micro-batch into one sequence, attention.py
keeps each response to its prompt and itself (by the kernels that kernels.py finds), logps.py reads off log-probs, and
row_engine.py joins this to verl's FSDP engine. recompute.py decides what backward computes again, adapter.py writes
checkpoints of LoRA's.
"""
