#include "gated_activation_kernels.h"
