"""Looking at experts and running experiments: router statistics, batches, comparisons.

Stands beside ``hooks/``: it loads chats through LLaMA-Factory's ``ChatModel`` and reads what ``experts/`` counts.
"""
