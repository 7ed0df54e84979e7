"""What only makes the evidence: none of it is in the package. CONTRIBUTING.md says how the scripts import one another."""
