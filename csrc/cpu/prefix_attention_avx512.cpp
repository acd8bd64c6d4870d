#include "prefix_attention_kernels.h"
