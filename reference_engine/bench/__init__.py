"""Measuring how fast a model runs under a memory ceiling, and what each step of the paper brings.

Files in the order of the flow: `synthetic_files` and `activity` make what is run where no model is given, `replay`,
`nothing_kept`, `bundle_readers` and `naive` are the variants of the engine that an ablation needs, `decoding` measures
one run, `single` and `ablation` measure one setting and all rows, `floor` says what the machine allows; `results`,
`tables`, `plot` and `output` are what is made of it.
"""
