#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

void bind_crc32c(nanobind::module_& module);

}  // namespace dscheck
