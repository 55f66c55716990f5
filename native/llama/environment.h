#pragma once

// Contexts that take profile and settings by themselves: fasa_use_environment. Off unless that was called.

// the caches of contexts to come lie in pinned host memory: FASA_MODE=host
bool fasa_environment_host();
