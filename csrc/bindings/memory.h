#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

void bind_memory(nanobind::module_& module);

}  // namespace dscheck
