"""The configuration of every stage, validated at the edge.

One YAML file describes a whole conversion; each section is one stage. A section's resolved values
are part of the stage's fingerprint, so everything that changes a result stands here and nothing
else does (progress bars, thread counts and the like are not configuration). The one exception is
``assemble.smoke_test``, which a run file has to be able to switch off.
"""
