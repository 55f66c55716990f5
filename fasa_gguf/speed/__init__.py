"""How fast FASA and dense decode."""
