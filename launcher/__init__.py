"""The commands of seqaware, one a file."""
