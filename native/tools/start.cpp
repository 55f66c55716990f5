// Linked into the tools of `make tools`: they take FASA from the model's file and from variables.

#include "fasa.h"

static const bool fasa_started = (fasa_use_environment(), true);
