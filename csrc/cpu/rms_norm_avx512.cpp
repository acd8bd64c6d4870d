#include "rms_norm_kernels.h"
