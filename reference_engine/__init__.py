"""The reference engine: runs flash files in less memory than they have bytes."""
