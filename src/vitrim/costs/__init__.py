"""What a model computes, step by step, and what each step costs."""

from vitrim.costs.steps import (
    SELECT,
    Step,
    answer,
    attention_macs,
    block,
    dense_levels,
    head,
    level,
    matching_macs,
    mlp,
    packed_part,
    plain_steps,
    pyramid_steps,
    select,
    select_part,
    sparse_levels,
    stem,
    total_macs,
    without_head,
)
