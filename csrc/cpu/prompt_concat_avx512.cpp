#include "prompt_concat_kernels.h"
