"""The verbs other than ``run``, and the generated pages of docs/."""
