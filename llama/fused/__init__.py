"""The model's own small operations in one kernel each, where Triton works; elsewhere torch does the same in several."""
