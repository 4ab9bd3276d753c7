#include <nanobind/nanobind.h>

#include "bindings/crc32c.h"

NB_MODULE(_core, module) { dscheck::bind_crc32c(module); }
