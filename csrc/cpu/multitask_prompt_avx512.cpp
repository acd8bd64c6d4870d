#include "multitask_prompt_kernels.h"
