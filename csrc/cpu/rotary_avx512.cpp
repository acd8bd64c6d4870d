#include "rotary_kernels.h"
