"""The reference store, and the orders that calls at once may end as."""
