"""Looks at a checkpoint of any kind and says in a page what it is, what is wrong with it, and what to do."""
