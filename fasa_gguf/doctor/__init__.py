"""What a bug report needs: the machine, the build, a self-test, and dense speed against what the memory allows."""
